"""What training minimizes: the losses, and the three tasks that compute them."""
