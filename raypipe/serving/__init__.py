"""The online service: a Ray Serve application that hosts a release and the night in force."""
