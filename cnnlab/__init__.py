"""cnnlab: build one CNN, then make its training faster, one technique at a time, measured live on your machine."""
