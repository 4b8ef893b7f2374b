"""What happens when sparse experts are merged."""
