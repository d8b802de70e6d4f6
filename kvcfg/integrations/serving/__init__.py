"""Continuous batching: requests of any lengths share every forward pass, over one pool of pages."""
