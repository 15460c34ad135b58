"""What is put before Python's path in processes whose network is guarded."""
