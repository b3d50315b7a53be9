"""What differs between the releases of vLLM that are supported, in one place and one function a difference.

Found by feature, never by a version's number. Each function says which releases it bridges; it can go with the last of
them. Objects are vLLM's own. `docs/` says how to take in a new release.
"""

SUPPORTED = ("0.22", "0.33")
"""The first release, and the first that is beyond what was read or run."""

__all__ = ["SUPPORTED"]
