"""Runs in processes of their own: started, streamed, stopped, cleaned up."""
