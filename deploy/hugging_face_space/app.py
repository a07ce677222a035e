"Starts the web app on a Hugging Face Space: its port, its one proxy, and the site that may show it in a frame"
from skin_gradcam.cli import main

if __name__ == '__main__':
    main(['serve', '--host', '0.0.0.0', '--port', '7860', '--proxies', '1', '--frame-ancestors', 'https://huggingface.co'])
