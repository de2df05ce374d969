"""What is asked and who judges the answers, a task a file."""
