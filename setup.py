"Requirements, extras and console scripts come from `settings.ini`: edit them there, not here."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

setup(packages=find_namespace_packages(include=[lib, f'{lib}.*'], exclude=['*__pycache__*']),
      include_package_data=True,
      install_requires=cfg['requirements'].split(),
      extras_require=extras,
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']})
