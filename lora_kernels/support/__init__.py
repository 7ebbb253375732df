"""What each backend can serve, for the ops that ask. Named so because ``lk.backends`` is a function."""
