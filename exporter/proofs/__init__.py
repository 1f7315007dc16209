"""What shows that a product steers as the adapter does."""
