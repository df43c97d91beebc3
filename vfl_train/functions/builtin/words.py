"""Common English nouns of five and of six letters: what the built-in ocr probes show."""

from __future__ import annotations

_FIVE = """
apple arrow badge baker beach berry board bread brick bride brush cabin cable camel candy canoe chain
chair chalk chess child clock cloud coach coral couch cream crowd crown dance diary dream dress drink
eagle earth elbow fence field flame flute fruit ghost giant glass glove goose grape grass guest heart
honey horse hotel house igloo ivory jelly jewel judge juice knife label lemon light linen lunch magic
maple medal metal money motor mouse mouth music night noise nurse ocean olive onion opera otter paint
panda paper pearl phone piano pilot pizza plane plant plate pupil queen quilt radio river robot salad
scale shark sheep shelf shirt shore skirt smile snake spoon stage steam stone storm sugar sword table
tiger toast tooth torch tower train truck uncle valve video villa voice wagon watch water whale wheat
wheel woman world yacht zebra
"""
_SIX = """
animal anchor artist autumn badger ballet banana barrel basket battle beaver bottle branch bridge bucket
butter button camera candle canyon carpet castle cattle cherry church circle coffee copper cotton cousin
desert dinner doctor dollar donkey dragon engine eraser family farmer father finger flower forest galaxy
garage garden garlic ginger guitar hammer harbor helmet hunter insect island jacket jaguar jersey jungle
kettle kitten knight ladder laptop lawyer letter lizard magnet market marble mirror monkey mother museum
napkin needle number office orange orchid oyster palace parrot pencil pepper pillow pirate planet pocket
police potato puzzle rabbit ribbon rocket sailor salmon saddle school shadow silver singer spider spring
square statue street summer sunset teapot temple tennis ticket tomato tongue tunnel turtle umpire valley
velvet violin walnut window winter wizard yogurt zipper
"""
FIVE, SIX = tuple(_FIVE.split()), tuple(_SIX.split())
