"""Activations of contrastive pairs, each distinct token computed once."""
