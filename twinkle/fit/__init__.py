"""Whether an implementation can stand in for a target: parameters, attributes, hooks; nothing runs."""
