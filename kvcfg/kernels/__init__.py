"""Compiled code only: a kernel, its loader, and nothing that a configuration would say."""
