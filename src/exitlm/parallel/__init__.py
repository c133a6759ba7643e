"""Training over several processes: device mesh, pipeline schedules and what runs them."""
