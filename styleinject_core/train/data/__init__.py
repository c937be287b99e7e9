"""What is trained on: pictures and captions, their buckets, and the batches they become."""
