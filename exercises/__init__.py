"""The course: ten functions to write, five silent bugs to find, the oracle, and labs."""
