"""What all tests share: nothing is judged by how long it takes, so hypothesis has no deadlines."""

from hypothesis import settings

settings.register_profile("nodeproxy", deadline=None)
settings.load_profile("nodeproxy")
