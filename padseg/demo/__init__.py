"""A page in the browser: a picture becomes regions, which change with a slider, light up at a click and can be downloaded.

What the page does are plain functions, by stage; only page.py and app.py import gradio, an optional library.
"""
