"""Capture of routing. Runs in vLLM's scheduler and workers."""
