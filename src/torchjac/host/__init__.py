"""What differs between operating systems, processors and interpreters: all of it is here."""
