"""Several behaviours in one adapter."""
