"""From scored snippets of an observation to a table of candidates: lines, their fits, events, false alarms."""
