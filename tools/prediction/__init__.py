"""The time of a launch and of a step, predicted from compiled code and the constants of a GPU."""
