"""Git Re-Basin for models trained from different starts: known architectures, their symmetries, and the order that matches another model."""
