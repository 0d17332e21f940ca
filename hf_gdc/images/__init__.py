"""Images: data, players, batches, metrics' features and certified sampling for `trainers/image_gan.py`."""
