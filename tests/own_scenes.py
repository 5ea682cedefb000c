"""BDDL files as users would write them."""

KITCHEN = """\
; a scene of our own: what stands on it is LIBERO's
(define (problem LIBERO_Kitchen_Tabletop_Manipulation)
  (:domain robosuite)
  (:language Put the butter on the plate)
  (:regions
    (left (:target kitchen_table) (:ranges ((-0.1 -0.2 -0.05 -0.15))))
    (middle (:target kitchen_table) (:ranges ((0.0 0.0 0.06 0.05))) (:yaw_rotation ((0.0 pi/4))))
    (back (:target kitchen_table) (:ranges ((-0.26 0.24 -0.24 0.26))))
    (top_side (:target cabinet))
    (bottom_region (:target cabinet))
  )
  (:fixtures kitchen_table - kitchen_table cabinet - white_cabinet)
  (:objects butter - butter dish - plate mug bowl - white_yellow_mug)
  (:obj_of_interest butter dish)
  (:init
    (On butter kitchen_table_left)
    (On dish kitchen_table_middle)
    (On cabinet kitchen_table_back)
    (On mug cabinet_top_side)
    (On bowl dish)
    (Open cabinet_bottom_region)
  )
  (:goal (And (On butter dish)))
)
"""
FLOOR = """\
(define (problem LIBERO_Floor_Manipulation)
  (:domain robosuite)
  (:language pick up the milk and put it in the basket)
  (:regions
    (here (:target floor) (:ranges ((-0.15 -0.12 -0.05 -0.02))))
    (there (:target floor) (:ranges ((-0.01 0.25 0.01 0.27))))
    (contain_region (:target basket))
  )
  (:fixtures floor - floor)
  (:objects milk - milk basket - basket)
  (:init (On milk floor_here) (On basket floor_there))
  (:goal (And (In milk basket_contain_region)))
)
"""
