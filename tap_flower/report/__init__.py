"""What a run leaves for people: events, results, tables."""
