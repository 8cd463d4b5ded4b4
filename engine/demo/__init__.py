"""The bundled model, as data; `Engine.from_pretrained("demo")` loads it."""
