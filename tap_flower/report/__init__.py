"""What a run leaves for people: events, results, the HTML report, tables, experiment trackers."""
