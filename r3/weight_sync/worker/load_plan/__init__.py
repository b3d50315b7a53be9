"""Load plans: what vLLM's weight loaders do, recorded once and proved, done again as a few large copies."""
