"""What is trained: noise schedules, and models that predict under them."""
