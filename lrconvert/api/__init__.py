"""What lrconvert does, one file a verb. Each command of the command line calls one of these and prints its record."""
