"""What can be done with adapters once they are trained: look, compare, combine, make smaller, turn into other formats."""
