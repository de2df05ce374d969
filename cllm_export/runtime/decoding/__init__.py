"""How a request decodes: policies, the scheduler, sampling, text. The code here uses only lists and numpy."""
