"""Recipes and results: what happens when finetunes are pruned and merged."""
