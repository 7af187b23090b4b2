"""How a model is spread over hardware: degrees, memory and order, decided without touching a tensor."""
