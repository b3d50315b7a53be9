"""Differences between the supported releases of vLLM, in one place, with one function per difference.

Differences are detected by feature, never by version number. Each function says which releases it bridges, and can be
removed with the last of them. Objects are vLLM's own. docs/how-to/upgrade-vllm.md says how to support a new release.
"""
