"""Layout: slabs become the tensors that the user asked for, nested as outputs x inputs."""
