"""Where objects lie: the ``Store`` waist, its implementations and the layers around them."""
