"""Load plans: vLLM's weight loading, recorded once, proved, and replayed as a few large copies."""
