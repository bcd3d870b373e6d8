"""From a captured graph to a compiled callable: options, capture, passes inside Inductor, split, hoisted step."""
