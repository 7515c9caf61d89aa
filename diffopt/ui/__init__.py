"""The page: one module per tab, put together in `page`. Only this package and its command know gradio."""
