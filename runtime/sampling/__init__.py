"""The sampling algebra: plans, solvers, controllers, guidance and noise, as data and short functions over NumPy."""
