"""What the command line shows, a module for each subject."""
