"""How a request decodes: policies, the scheduler, sampling, text. Lists and numpy alone."""
