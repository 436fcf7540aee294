"""Scripts that maintainers run; they are not in the wheel."""
