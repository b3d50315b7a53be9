"""r3 inside trainers: one thin module for each."""
