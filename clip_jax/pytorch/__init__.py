"""Weights of PyTorch's CLIPs: what their files hold, how their tensors are named, what their configs say.

    files.py     a file or folder <-> named arrays, without executing anything that a file says
    layouts.py   named arrays <-> our parameters: one table a layout
    configs.py   their configurations <-> CLIPConfig: OpenAI's; open_clip_configs.py, hf_configs.py
"""
