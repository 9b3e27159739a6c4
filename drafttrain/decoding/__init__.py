"""The bundled decoder: engine, drafters, stopping rules, verification and the loop."""
