"""Differences between the supported releases of vLLM, in one place, with one function per difference.

Differences are detected by feature, never by version number. Each function says which releases it bridges, and can be
removed with the last of them. Objects are vLLM's own. docs/how-to/upgrade-vllm.md says how to support a new release.
"""

SUPPORTED = ("0.22", "0.33")
"""The first release, and the first that is beyond what was read or run."""

__all__ = ["SUPPORTED"]
