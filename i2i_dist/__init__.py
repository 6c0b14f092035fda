"""i2i_dist: distributed training of image-to-image translation GANs."""

__version__ = "0.1.0"
