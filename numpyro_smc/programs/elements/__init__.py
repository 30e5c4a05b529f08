"""Which elements of a plate the numbers of a program depend on."""
